"""config -> [choices] -> error: options of a few words, declared as Literal types so that --help lists them too."""

from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(config: Any, section: str) -> None:
    """Checks every field of a dataclass whose type is a Literal.

    Args:
        section: what the config is called on the command line, as in `data` of `--data.decoder`.
    Raises:
        ValueError: another value than the type lists.
    """
    for name, hint in get_type_hints(type(config)).items():
        choices, value = get_args(hint), getattr(config, name)
        if get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{section}.{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
