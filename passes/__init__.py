"""tamis.passes."""

if __name__ != "tamis.passes":
    raise ImportError("import tamis.passes, not passes: a second copy would register every op twice")
