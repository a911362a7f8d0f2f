"""Stop strings and streamed text: where a text ends, and what may be shown before that is known."""

import pytest
from decode_toys import ToyDecoder
from hypothesis import given
from hypothesis import strategies as st

from realm_jax.decode.stop import RowText, find_stop, held_back


def row(pieces, stops=()):
    return RowText(ToyDecoder([p.encode() if isinstance(p, str) else p for p in pieces]), stops)


def read(pieces, stops=()):
    """What a row shows piece by piece, and the row."""
    text = row(pieces, stops)
    shown = [text.push(i) for i in range(len(pieces))]
    return [*shown, text.finish()], text


@pytest.mark.parametrize(
    ("text", "stops", "cut"),
    [
        ("hello", ["l"], 2),
        ("hello", ["lo", "ell"], 1),
        ("hello", ["x"], None),
        ("hello", [], None),
        ("abcd", ["abcd", "bc"], 1),  # "bc" is complete first
        ("abcd", ["abc", "bc"], 0),  # both end together: the longer
        ("aab", ["ab"], 1),
    ],
)
def test_the_stop_string_complete_first_wins(text, stops, cut):
    assert find_stop(text, stops) == cut


def test_what_might_begin_a_stop_string_is_held_back():
    assert held_back("one <", ["<end>"]) == 1
    assert held_back("one <en", ["<end>", "n"]) == 3
    assert held_back("one <ex", ["<end>"]) == 0
    assert held_back("aaa", ["aab"]) == 2
    assert held_back("one", []) == 0


def test_held_back_text_appears_once_it_cannot_stop_the_row():
    shown, text = read(["a <", "e", "n", "ough> b"], ["<end>"])
    assert shown == ["a ", "", "", "<enough> b", ""]
    assert not text.stopped and text.tokens == [0, 1, 2, 3]


def test_held_back_text_appears_at_the_end():
    shown, text = read(["a <", "en"], ["<end>"])
    assert shown == ["a ", "", "<en"]
    assert text.text == "a <en"


def test_a_stop_string_across_tokens_cuts_before_it():
    shown, text = read(["one", " <e", "nd", "> two"], ["<end>"])
    assert "".join(shown) == text.text == "one "
    assert text.stopped
    assert text.tokens == [0, 1]  # " <e" begins before the cut, "nd" does not


def test_a_stop_string_inside_one_token_cuts_it():
    shown, text = read(["one. two. three"], ["."])
    assert shown == ["one", ""] and text.tokens == [0]


def test_a_stop_string_at_the_very_beginning_leaves_nothing():
    shown, text = read(["\n", "x"], ["\n"])
    assert "".join(shown) == "" and text.tokens == [] and text.stopped


def test_tokens_after_the_stop_are_ignored():
    text = row(["a", "!", "b"], ["!"])
    assert [text.push(i) for i in range(3)] == ["a", "", ""]
    assert text.tokens == [0]


def test_characters_of_several_tokens_are_shown_whole_and_can_be_stop_strings():
    snow = "☃".encode()
    shown, text = read(["a", snow[:1], snow[1:2], snow[2:], "b"])
    assert shown == ["a", "", "", "☃", "b", ""] and text.tokens == [0, 1, 2, 3, 4]
    shown, text = read(["a", snow[:1], snow[1:2], snow[2:], "b"], ["☃"])
    assert shown == ["a", "", "", "", "", ""] and text.stopped
    assert text.tokens == [0]  # every part of the snowman begins where it begins


def test_an_unfinished_character_shows_as_the_replacement_character():
    shown, text = read(["a", "☃".encode()[:2]])
    assert shown == ["a", "", "\ufffd"] and text.text == "a\ufffd"


def test_without_a_decoder_there_are_tokens_and_no_text():
    text = RowText(None)
    assert [text.push(5), text.push(6), text.finish()] == ["", "", ""]
    assert text.tokens == [5, 6] and text.text == ""


@given(
    st.lists(st.text("ab☃", min_size=1, max_size=4), max_size=12),
    st.lists(st.text("ab☃", min_size=1, max_size=4), max_size=3),
    st.randoms(use_true_random=False),
)
def test_text_does_not_depend_on_where_tokens_begin(words, stops, random):
    """Any split of the bytes into tokens gives the same text; what was shown is a prefix of it at every moment."""
    data = "".join(words).encode()
    cuts = sorted(random.sample(range(len(data) + 1), min(len(data), 5)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    whole = data.decode()
    cut = find_stop(whole, stops)
    want = whole if cut is None else whole[:cut]

    text, shown = row(pieces, stops), ""
    for i in range(len(pieces)):
        shown += text.push(i)
        assert want.startswith(shown)
    shown += text.finish()
    assert shown == text.text == want
    assert text.stopped == (cut is not None)
    assert find_stop(shown, stops) is None
    kept = b"".join(pieces[: len(text.tokens)])
    assert kept.startswith(want.encode()) and text.tokens == list(range(len(text.tokens)))
