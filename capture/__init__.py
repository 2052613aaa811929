"""tamis.capture."""

if __name__ != "tamis.capture":
    raise ImportError("import tamis.capture, not capture: a second copy would register every op twice")
