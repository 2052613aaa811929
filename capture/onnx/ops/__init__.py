"""ONNX operations as torch functions, a file per kind; see `table` for what a function may ask for."""
