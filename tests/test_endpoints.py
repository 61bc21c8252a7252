"""tt_ckpt and tt_data, which do not know each other, have one rule for where a token goes."""

import inspect

import pytest

import tt_ckpt.hub.endpoint
import tt_data.rows.endpoint

URLS = (
    "https://huggingface.co http://localhost http://localhost.evil.com http://127.0.0.2 HTTP://[::1]:80 x https://h?x"
    " http://a:b@localhost http://a:b@localhost@evil https://h:1/a http://127.1"
).split()


def verdict(package, url):
    try:
        return package.check_url("HF_ENDPOINT", url)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("url", ["", *URLS])
def test_both_judge_a_url_alike_and_say_the_same(url):
    assert verdict(tt_ckpt.hub.endpoint, url) == verdict(tt_data.rows.endpoint, url)


@pytest.mark.parametrize("name", ["_is_home", "refuse_proxy", "_Once", "_say_once"])
def test_what_both_have_is_the_same(name):
    assert inspect.getsource(getattr(tt_ckpt.hub.endpoint, name)) == inspect.getsource(
        getattr(tt_data.rows.endpoint, name)
    )


def test_both_speak_through_one_logger():
    assert tt_ckpt.hub.endpoint._said is tt_data.rows.endpoint._said
