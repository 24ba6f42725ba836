"""Configuration: JSON files into frozen, strict dataclasses, and the one way a script ends on a user's mistake."""

from .command_line import json_schema, training_arguments
from .fields import config, config_error, renamed_field, resumable_field
from .json_files import parse_json, quoted, read_json, read_text
from .lengths import ENDLESS, Length, Span, kind_of, to_steps
from .mistakes import FORBIDDEN, FULL, UserError, prefix_errors, run_script
from .unions import NameIn, OpenUnion
from .validation import differences, dump, load, validate
