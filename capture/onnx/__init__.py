"""ONNX files as models: read safely, evaluated node by node in torch, so that `torch.export` captures them."""
