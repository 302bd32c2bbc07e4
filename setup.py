"""Compiled parts. Each is optional at install time, so that the core works without a compiler; what needs one says so itself."""

from setuptools import Extension, setup

COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension(
            "elastic_ep.models._kernels",
            ["elastic_ep/models/_kernels.c"],
            depends=[f"elastic_ep/models/{name}.h" for name in ("_attention", "_matmul", "_rows")],
            extra_compile_args=COMPILE_ARGS,
            optional=True,
        ),
        Extension(
            "elastic_ep.runtime.dispatch._rows",
            ["elastic_ep/runtime/dispatch/_rows.c", "elastic_ep/runtime/dispatch/_link.c"],
            depends=["elastic_ep/runtime/dispatch/_native.h", "elastic_ep/runtime/dispatch/_kernels.h"],
            extra_compile_args=COMPILE_ARGS,
            optional=True,
        ),
        Extension(
            "elastic_ep.runtime.weights._digest",
            ["elastic_ep/runtime/weights/_digest.c"],
            extra_compile_args=COMPILE_ARGS,
            optional=True,
        ),
        Extension(
            "elastic_ep.core.eplb._native",
            ["elastic_ep/core/eplb/_native.c"],
            depends=[f"elastic_ep/core/eplb/native/{name}.h" for name in ("layer", "pack", "quotas", "refine", "repair", "solve")],
            extra_compile_args=COMPILE_ARGS,
            optional=True,
        ),
    ]
)
