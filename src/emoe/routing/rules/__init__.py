"""Routing rules: what each family's router would choose if some experts did not exist.

`kinds` are pure functions, `families` read their settings from transformers' router modules, `registry`
says which class follows which, `rule` attaches one to a model.
"""

from emoe.routing.rules.registry import ENTRIES as ENTRIES
from emoe.routing.rules.rule import Attachment as Attachment
from emoe.routing.rules.rule import RouterRule as RouterRule
from emoe.routing.rules.rule import has_rule as has_rule
from emoe.routing.rules.rule import rule_for as rule_for
