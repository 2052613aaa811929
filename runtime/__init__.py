"""tamis.runtime: `compile` and `load`, the command, and what runs afterwards (verify, benchmark)."""

if __name__ != "tamis.runtime":
    raise ImportError("import tamis.runtime, not runtime: a second copy would register every op twice")
