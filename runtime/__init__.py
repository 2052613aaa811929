"""tamis.runtime."""

if __name__ != "tamis.runtime":
    raise ImportError("import tamis.runtime, not runtime: a second copy would register every op twice")
