"""Expert parallelism that survives its ranks. `docs/structure.md` says what each package owns."""

__version__ = "0.1.0"
