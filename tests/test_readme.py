import re
import subprocess
from pathlib import Path

import pytest

from megatron_rlvr.config import RECIPES, config_keys, load_config
from megatron_rlvr.training.composition import compose_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_its_links_and_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_its_keys_exist():
    sections = {key.split(".")[0] for key in config_keys()}
    for section, name in re.findall(r"`(\w+)\.(\w+)[`=]", README):
        if section in sections:
            assert f"{section}.{name}" in config_keys(), f"{section}.{name}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_explains_every_recipe(recipe):
    assert f"`{recipe}`" in README


def test_ci_runs_the_readmes_test_command():
    assert "make test" in README
    assert (ROOT / ".ci" / "run").read_text().strip().endswith("make test")


def test_the_runs_of_make_demo_pass_their_checks():
    """What every rank of them would refuse is found before they start."""
    listed = subprocess.run(["make", "-n", "-o", ".venv/installed", "demo"], cwd=ROOT, capture_output=True, text=True)
    runs = re.findall(r"megatron-rlvr train (.+)", listed.stdout)
    assert len(runs) == 2
    recipes = []
    for run in runs:
        path, *overrides = run.split()
        config = load_config(ROOT / path, overrides)
        recipes.append(compose_run(config, prompts=2000).recipe.name)
    assert recipes == ["none", "par"]
