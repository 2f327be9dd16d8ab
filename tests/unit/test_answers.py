"""Final answers: what is found in a text, and which two answers are equal."""

import pytest

from rlx.rewards.answers import canonical, extract, extract_gold, same_answer, same_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"the set { of \boxed{6}", "6"),
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### 1\n#### 1,234\nDone 5.", "1,234"),
        (r"#### 3 and \boxed{4}", "4"),
        ("The answer is 42. I hope that 7 people agree.", "42"),
        ("**Answer:** 3.5 apples", "3.5 apples"),
        ("The answer is 3. No: the answer is 4.", "4"),
        ("Final answer:\n\nB", "B"),
        ("125", "125"),
        (" Paris\n", "Paris"),
        ("12 and 30 make 42.", "42"),
        ("from 10-3 to x = -3", "-3"),
        ("5-3", "5-3"),
        ("we get 5 - 3, or 5-3", "3"),
        ("it costs $1,234.50!", "$1,234.50"),
        ("about 3/4 of it", "3/4"),
        ("no idea at all", None),
        ("", None),
        (r"\boxed{}", r"\boxed{}"),
    ],
)
def test_extract_auto(text, answer):
    assert extract(text) == answer


def test_extract_takes_only_what_is_asked_for():
    text = "7\n#### 8\nThe answer is 9"
    assert extract(text, "boxed") is None
    assert extract(text, "hash") == "8"
    assert extract(text, "last_number") == "9"
    assert extract("  a b \n", "whole") == "a b"
    assert extract(" \n", "whole") is None


def test_a_worked_solution_is_a_gold_answer():
    assert extract_gold("48 / 2 = 24\n48 + 24 = 72\n#### 72") == "72"
    assert extract_gold(r"Hence \boxed{x^2}.") == "x^2"
    assert extract_gold(" 1 apple ") == "1 apple"
    assert extract_gold(125) == "125"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1,234", "1234"),
        ("$18", "18"),
        (r"\$18.00", "18"),
        ("50%", "50"),
        (r"50\%", "50 percent"),
        ("3/4", "0.75"),
        ("6/8", "3 / 4"),
        ("-0.50", "-1/2"),
        ("\u22125", "-5"),
        ("-$5", "$-5"),
        ("1e3", "1000"),
        ("2.5E-1", ".25"),
        ("18.", "18"),
        ("$5$.", "5"),
        ("**18**", "+18"),
        ("18 dollars", "18"),
        ("18 dollars", "18 Dollars"),
        ("0.1", "1/10"),
        ("007", "7"),
    ],
)
def test_equal_numbers(a, b):
    assert same_number(a, b) is True
    assert same_number(b, a) is True


@pytest.mark.parametrize(
    ("a", "b"),
    [("1,234", "1.234"), ("50%", "0.5"), ("5", "-5"), ("1/3", "0.3333333333"), ("5 cm", "5 dm"), ("3/0", "3/0")],
)
def test_unequal_numbers(a, b):
    assert same_number(a, b) is False


@pytest.mark.parametrize("text", ["x", "1,2", "(1, 2)", "1 2", "3x", "5 m", "2^3", "", "--5", "__import__('os')", "1e"])
def test_not_a_number(text):
    assert same_number(text, "5") is None
    assert same_number("5", text) is None


def test_numbers_without_bound_equal_nothing():
    assert same_number("9" * 400, "9" * 400) is True
    assert same_number("9" * 401, "9" * 401) is False
    assert same_number("1e400", "1e400") is True
    assert same_number("1e401", "1e401") is False
    assert same_number("1e999999999999", "1") is False
    assert same_number("1e-999999999999", "0") is False


def test_text_is_compared_without_case_and_white_space():
    assert same_answer("  New   York.", "new york")
    assert same_answer(r"\frac{1}{2}", r"$\frac{1}{2}$")
    assert not same_answer("Paris", "London")
    assert not same_answer("5", "five")


def test_canonical_gives_equal_answers_one_spelling():
    assert canonical("0.50") == canonical("1/2") == canonical("$.5") == "1/2"
    assert canonical("B.") == canonical(" b ") == "b"
    assert canonical("1/3") != canonical("0.33")
