"""Configuration: JSON files into frozen, strict dataclasses, and the one way a script ends on a user's mistake."""

from .fields import (
    ENDLESS,
    Length,
    NameIn,
    OpenUnion,
    Span,
    config,
    config_error,
    json_schema,
    kind_of,
    renamed_field,
    resumable_field,
    to_steps,
)
from .json_files import parse_json, quoted, read_json, read_text
from .script import (
    FORBIDDEN,
    FULL,
    PACKAGE,
    SCRIPTS,
    CommandLine,
    UserError,
    prefix_errors,
    refuse_options,
    run_script,
    script_command,
    training_arguments,
)
from .validation import differences, dump, load, validate
