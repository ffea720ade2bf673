from __future__ import annotations

import os

import pytest

from icce_ray.methods.heads.communicator import GLOO_INTERFACE, interface_of, talk_over


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None  # kept for documentation: nobody has it


def test_the_interface_of_an_address_is_used_unless_one_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO_INTERFACE, "chosen")
    talk_over("127.0.0.1")
    assert os.environ[GLOO_INTERFACE] == "chosen"
    monkeypatch.delenv(GLOO_INTERFACE)
    talk_over("203.0.113.7")
    assert GLOO_INTERFACE not in os.environ
    talk_over("127.0.0.1")
    assert os.environ[GLOO_INTERFACE] == "lo"
    monkeypatch.delenv(GLOO_INTERFACE)
