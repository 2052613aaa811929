"""tamis.lowering."""

if __name__ != "tamis.lowering":
    raise ImportError("import tamis.lowering, not lowering: a second copy would register every op twice")
