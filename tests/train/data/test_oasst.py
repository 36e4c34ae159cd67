"""OpenAssistant's trees: flat messages put together, and the top-ranked reply at every level."""

from __future__ import annotations

from typing import Any

import pytest
from oasst_tree import TREE, message

from adapterhub.errors import DatasetError
from train.data.conversation import Conversation
from train.data.formats import examples_of
from train.data.readers import Row, Rows


def texts(*rows: dict[str, Any]) -> list[str]:
    return [message.content for talk in talks(*rows) for message in talk.messages]


def talks(*rows: dict[str, Any]) -> list[Conversation]:
    found = examples_of(Rows(tuple(Row(f"x:{n}", row) for n, row in enumerate(rows, 1)), ()), name="x", format=None)
    return [item for item in found.examples if isinstance(item, Conversation)]


def refusal(*rows: dict[str, Any]) -> str:
    with pytest.raises(DatasetError) as caught:
        talks(*rows)
    return str(caught.value)


def nested(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    own = next(row for row in rows if row["message_id"] == name)
    replies = [nested(row["message_id"], rows) for row in rows if row["parent_id"] == name]
    return {key: value for key, value in own.items() if key != "parent_id"} | {"replies": replies}


def test_the_top_ranked_reply_is_taken_at_every_level_and_an_open_question_left_out() -> None:
    assert texts(*TREE) == ["text p", "text a0", "text q0", "text a3"]


def test_the_order_of_the_rows_does_not_matter() -> None:
    assert texts(*TREE[::-1]) == texts(*TREE)


def test_nested_trees_give_the_same_as_their_messages() -> None:
    tree = {"message_tree_id": "p", "tree_state": "ready_for_export", "prompt": nested("p", TREE)}
    assert texts(tree) == texts(*TREE)


def test_each_tree_is_one_conversation_placed_at_its_prompt() -> None:
    rows = [message("a", "p"), message("p", None), message("r", None), message("a8", "r")]
    assert [talk.where for talk in talks(*rows)] == ["x:2", "x:3"]


@pytest.mark.parametrize("change", [{"deleted": True}, {"review_result": False}])
def test_deleted_and_rejected_replies_do_not_count(change: dict[str, Any]) -> None:
    assert texts(message("p", None), message("a0", "p", 0) | change, message("a1", "p", 1)) == ["text p", "text a1"]


def test_of_replies_without_a_rank_the_first_stands() -> None:
    assert texts(message("p", None), message("a7", "p"), message("a8", "p")) == ["text p", "text a7"]
    assert texts(message("p", None), message("a7", "p"), message("a8", "p", 5)) == ["text p", "text a8"]


def test_trees_that_are_not_ready_are_left_out() -> None:
    unready = {"message_tree_id": "z", "tree_state": "aborted_low_grade", "prompt": nested("p", TREE)}
    assert texts(*TREE, unready) == texts(*TREE)


def test_a_tree_nobody_answered() -> None:
    assert "has no conversation in 1 row" in refusal(message("p", None))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (message("a9", "nowhere"), "x:11: parent nowhere is not in the data"),
        (message("a0", "p"), "x:11: duplicate message_id 'a0'"),
        (message("a9", "p") | {"message_id": 5}, "x:11: message_id 5 is not a string"),
        (message("a9", "p") | {"message_id": ["a9"]}, "x:11: message_id ['a9'] is not a string"),
        (message("a9", "p") | {"parent_id": ["p"]}, "x:11: parent ['p'] is not in the data"),
        (message("p", "a0"), "x:11: duplicate message_id 'p'"),
        (message("x", None, role=["prompter"]), "x:11: role ['prompter'] is neither prompter nor assistant"),
        (message("x", None, role="narrator"), "x:11: role 'narrator' is neither prompter nor assistant"),
    ],
)
def test_a_row_that_belongs_to_no_tree(row: dict[str, Any], words: str) -> None:
    assert words in refusal(*TREE, row)


@pytest.mark.parametrize("rank", [[0], "first", 10**400])
def test_a_rank_that_is_not_a_number(rank: Any) -> None:
    assert "is not a number" in refusal(message("p", None), message("a1", "p", rank), message("a2", "p", 1))


def test_messages_in_a_circle_belong_to_no_tree() -> None:
    circle = [message("a5", "q5"), message("q5", "a5")]
    assert "x:11, x:12: no prompt above it" in refusal(*TREE, *circle)


def test_an_answer_to_an_answer() -> None:
    assert "message 3 has role assistant, expected user" in refusal(
        message("p", None), message("a1", "p"), message("a2", "a1")
    )
