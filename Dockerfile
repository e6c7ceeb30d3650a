# Two images. Neither has been built yet: no Docker engine was at hand, so read this as a careful draft and report what fails.
#
#   docker build --target cpu -t megatron-rlvr:cpu .
#   docker run --rm -v megatron-rlvr-runs:/app/runs megatron-rlvr:cpu                  # the demo, figures in the volume
#
#   docker build --target cuda -t megatron-rlvr:cuda .
#   docker run --rm --gpus all --ipc host -v "$PWD/data:/data:ro" -v megatron-rlvr-runs:/app/runs \
#       megatron-rlvr:cuda megatron-rlvr train /data/run.yaml
#
# Neither needs a secret to build or to run, and neither runs as root.

# NGC's image brings torch 2.13, TransformerEngine and NCCL for Python 3.12.
ARG NGC=26.07-py3

# ---- cpu: what `make demo` does anywhere else, with its virtual environment in /opt/venv

# The full Python image has the compiler that one of the test dependencies needs.
FROM python:3.11 AS cpu-build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip make setup VENV=/opt/venv TORCH_INDEX="$TORCH_INDEX"

FROM python:3.11-slim AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 rlvr
WORKDIR /app
COPY --from=cpu-build /opt/venv /opt/venv
COPY --from=cpu-build /app /app
RUN install -d -o rlvr -g rlvr runs
ENV PATH="/opt/venv/bin:$PATH" PYTHONDONTWRITEBYTECODE=1
USER 10001
CMD ["make", "demo", "VENV=/opt/venv"]

# ---- cuda: NGC's torch and TransformerEngine stay as they are; ours goes beside them

FROM nvcr.io/nvidia/pytorch:${NGC} AS cuda
ARG MEGATRON_CORE=0.19.2
RUN useradd --create-home --uid 10001 rlvr && python -m venv --system-site-packages /opt/venv
ENV PATH="/opt/venv/bin:$PATH" PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY . .
# NGC pins every package of its own in PIP_CONSTRAINT, numpy included, and calls its torch a pre-release of 2.13, which our
# range does not admit: so torch is left out of the list, and what depends on it is installed without dependencies.
RUN --mount=type=cache,target=/root/.cache/pip unset PIP_CONSTRAINT \
    && python -c 'import tomllib; read = lambda path: tomllib.load(open(path, "rb"))["project"]["dependencies"]; \
print(*(name for path in ("pyproject.toml", "sandbox/pyproject.toml") for name in read(path) \
if not name.startswith(("torch", "megatron-core"))), "packaging>=24.2", sep="\n")' > /tmp/requirements.txt \
    && python -m pip install --requirement /tmp/requirements.txt \
    && python -m pip install --no-deps "megatron-core==$MEGATRON_CORE" ./sandbox . \
    && rm /tmp/requirements.txt \
    && install -d -o rlvr -g rlvr runs
USER 10001
# NGC's entry point stays: it checks the driver and then runs the command.
CMD ["megatron-rlvr", "keys"]
