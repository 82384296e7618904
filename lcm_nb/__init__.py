__version__ = "0.1.0"

# The names a newcomer types, loaded when first used: `import lcm_nb` stays quick and needs no torch.
_lazy = {
    "load_space": "lcm_nb.concepts.space",
    "load_lcm": "lcm_nb.models.lcm",
    "Sampling": "lcm_nb.models.config",
    "Stopping": "lcm_nb.models.config",
    "Writer": "lcm_nb.generation.writer",
}
__all__ = ["__version__", *_lazy]


def __getattr__(name):
    if name not in _lazy: raise AttributeError(f"module 'lcm_nb' has no attribute '{name}'")
    from importlib import import_module
    return getattr(import_module(_lazy[name]), name)


def __dir__(): return __all__
