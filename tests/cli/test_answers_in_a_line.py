"""Answers of tasks as people read them: shares in percent, other numbers in their own units."""

import pytest

from smallfry.cli._answers import in_a_line


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (
            {"state": "a", "probabilities": {"a": 0.75, "b": 0.25}},
            "a  probabilities: a 75.0%, b 25.0%",
        ),
        (
            {"place": "7", "score": 12.0, "best": {"7": 12.0, "3": 4.5}},
            "7  score 12  best: 7 12, 3 4.5",
        ),
        (
            {"maximum": 0.00581, "minimum": -2.5, "mean": 0.5, "fields": {"field": [[1.0], [2.0]]}},
            "maximum 0.00581  minimum -2.5  mean 0.5  (--json: fields)",
        ),
        ({"opacity": 0.5, "scale_0": -2.0}, "opacity 0.5  scale_0 -2"),
        ({"nodes": [{"class": "a", "probability": 0.5}]}, "(--json: nodes)"),
        (
            {"disparity_png16": "A" * 900, "disparity": {"least": 1.0, "median": 2.25}},
            "disparity: least 1, median 2.25  (--json: disparity_png16)",
        ),
        (
            {
                "object": "mug",
                "pose": {"rotation": [[1.0, 0.0, 0.0]] * 3, "translation": [0.1, 0.0, 0.8]},
                "inliers": 9,
                "keypoints": [None] * 8,
            },
            "mug  pose: translation 0.1 0 0.8  inliers 9  (--json: pose rotation, keypoints)",
        ),
        ({"object": "mug", "pose": None, "inliers": 0}, "mug  pose none  inliers 0"),
        (["12", "21"], "['12', '21']"),
    ],
)
def test_each_part_is_shown_by_name_and_what_is_too_long_is_named(value, line):
    assert in_a_line(value) == line
