"""A package, so that it is not taken for the top-level `tests` that torch-fidelity installs."""
