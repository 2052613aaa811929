"""tamis.kernels."""

if __name__ != "tamis.kernels":
    raise ImportError("import tamis.kernels, not kernels: a second copy would register every op twice")
