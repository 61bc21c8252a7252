"""Rows as text: colour or marks, cut in the middle, harmless to the terminal."""

from tt_cli.marking import mark, shorten
from tt_train.records.visible import visible

ROW = [("<user> 2+2?\n", False), ("<assistant> ", False), ("4", True), ("</s>", True)]


def test_without_colour_trained_text_stands_between_marks_once():
    assert mark(ROW, color=False) == "<user> 2+2?\n<assistant> \u27e64</s>\u27e7"


def test_with_colour_there_are_no_marks_and_only_trained_text_is_green():
    assert mark(ROW, color=True) == "<user> 2+2?\n<assistant> \x1b[32m4</s>\x1b[0m"


def test_colour_does_not_cross_a_line_end():
    assert mark([("a\n\nb", True)], color=True) == "\x1b[32ma\x1b[0m\n\n\x1b[32mb\x1b[0m"


def test_a_row_cannot_steer_the_terminal():
    assert mark([("\x1b[2J\r\x07", False)], color=True) == "\\x1b[2J\\r\\x07"
    assert visible("\u202e\u2028\x9b") == "\\u202e\\u2028\\x9b"


def test_text_of_any_script_stays_as_it_is():
    text = "tab\t, newline\n, caf\u00e9, \u65e5\u672c, \U0001f600, no-break\u00a0space"
    assert visible(text) == text


def test_long_stretches_keep_their_start_and_their_end():
    short = shorten([("a" * 50, False), ("b" * 50, False), ("c" * 9, True)], limit=10)
    assert short == [("aaaaa [... 90 characters ...] bbbbb", False), ("c" * 9, True)]


def test_what_is_short_enough_is_whole():
    assert shorten(ROW, limit=40) == [("<user> 2+2?\n<assistant> ", False), ("4</s>", True)]
