"""Labels are bounded, and those that are known keep their names."""

from __future__ import annotations

from emoe.tasks.keywords import OTHER
from emoe.tasks.labels import TASKS_AT_MOST, TaskLabels


def test_labels_cannot_be_more_than_so_many() -> None:
    labels = TaskLabels()
    assert labels(None) == OTHER
    made = {labels(f"task {i}") for i in range(1000)}
    assert len(made) == TASKS_AT_MOST and OTHER in made
    assert TaskLabels(["qa"])("qa") == "qa"
    assert labels("task 3") == "task 3" and labels("task 999") == OTHER
    assert labels(OTHER) == OTHER and TaskLabels(map(str, range(100)))("99") == "99"
