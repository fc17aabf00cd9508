"""Triton's interpreter, without what it does again and again to no end: three fifths of its time at small shapes.

What a kernel computes, and in which order, stays as it is.
"""

import functools
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


def hasten() -> None:
    """Let the interpreter prepare its language once a launch, look dtypes up once, leave out a check without effect.

    It prepares the language at every call of a function in a kernel, too; finds a dtype of numpy by a table that it
    makes for it; and computes all sums and products of integers again in 64 bits, for an assertion that it then skips
    (`device_assert` holds with the option `debug`, which the interpreter never sets). The interpreter of another
    Triton, whose inside has other names, stays as it is: no test depends on this.
    """
    inside = ("_patch_lang", "_get_np_dtype", "GridExecutor", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in inside):
        return
    prepare, launch, look_up = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    prepared: set[int] = set()  # namespaces of the modules that kernels and their functions come from
    dtypes: dict[str, Any] = {}

    def prepare_once(fn: Any) -> Any:
        namespace = id(fn.__globals__)
        if namespace in prepared:
            return None
        prepared.add(namespace)
        return prepare(fn)

    @functools.wraps(launch)
    def launch_anew(*args: Any, **kwargs: Any) -> Any:
        prepared.clear()  # the end of a launch takes the language back
        return launch(*args, **kwargs)

    def look_up_once(kind: Any) -> Any:
        name = kind.scalar.name  # a block's dtype is that of its elements
        if name not in dtypes:
            dtypes[name] = look_up(kind)
        return dtypes[name]

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._get_np_dtype = look_up_once  # pyrefly: ignore
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        assert not builder.options.debug
        builder.options = replace(builder.options, sanitize_overflow=False)
