"""What frames are signed with."""

from __future__ import annotations

import hmac

from hypothesis import given
from hypothesis import strategies as st

from llm_engine.api.messages import signer


@given(st.binary(max_size=200), st.binary(max_size=300))
def test_a_frame_is_signed_with_hmac_sha256(key: bytes, body: bytes) -> None:
    mac = signer(key)
    expected = hmac.digest(key, body, "sha256")[:16]
    assert mac(body) == expected
    assert mac(memoryview(body)) == expected, "a second time too"
