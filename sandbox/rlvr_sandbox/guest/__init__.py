"""What runs inside the sandbox beside untrusted code: standard library only, imported warm before a run starts.

Every guest is a module with ``main(source, channel)``. It answers one frame with one frame until the channel ends, then
returns, and its process exits 0. What a guest says beside candidate code is a claim; only ``tester`` says a verdict,
because no candidate code ever runs in its process.
"""
