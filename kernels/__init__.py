"""Triton kernels, one op per file, imported as ``fastadv.kernels`` and only when a CUDA tensor needs one."""

# Another package on PyPI is called `kernels`: never stand in for it when the repository root is on sys.path.
if __name__ == "kernels":
    raise ImportError("the folder kernels/ is the package fastadv.kernels; install the checkout: pip install -e .")
