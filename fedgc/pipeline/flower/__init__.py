"""The same clients and the same server on Flower, for more than one process or machine."""
