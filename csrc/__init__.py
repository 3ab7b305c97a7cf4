"""The C++ sources of the CPU ops; :mod:`fastadv.build` makes a shared library of them."""

if __name__ == "csrc":
    raise ImportError("the folder csrc/ is the package fastadv.csrc; install the checkout: pip install -e .")
