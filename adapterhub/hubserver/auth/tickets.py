"""Permissions that travel: signed addresses for uploads, short-lived tokens for Xet. Knows no users and no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass

from adapterhub.hubserver.errors import InvalidToken, UploadRefused
from adapterhub.hubserver.names import RepoId

UPLOAD_LIFETIME_S = 6 * 3600
XET_LIFETIME_S = 3600


@dataclass(frozen=True)
class UploadTicket:
    """The permission to upload one object to one repository, as it travels in an address."""

    repo_id: RepoId
    sha256: str
    size_bytes: int
    expires_s: int
    """seconds since 1970"""
    spool: str = ""
    """where its parts are gathered; empty when it comes in one piece"""
    part: int = 0
    """counted from 1; 0 is the whole"""


@dataclass(frozen=True)
class XetTicket:
    """The permission of one user to send chunks and files for one repository."""

    repo_id: RepoId
    user: str
    expires_s: int
    """seconds since 1970"""


class Signer:
    """Signs tickets (HMAC-SHA256) and checks them; whoever holds a signed ticket needs no other token."""

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def ticket(self, repo_id: RepoId, sha256: str, *, size_bytes: int) -> UploadTicket:
        """A ticket that holds from now for UPLOAD_LIFETIME_S."""
        return UploadTicket(repo_id, sha256, size_bytes, int(time.time()) + UPLOAD_LIFETIME_S)

    def signature(self, ticket: UploadTicket) -> str:
        """Hex signature over all parts of the ticket."""
        whole = f"upload {ticket.repo_id} {ticket.sha256} {ticket.size_bytes} {ticket.expires_s}"
        return self._sign(f"{whole} {ticket.spool} {ticket.part}" if ticket.spool else whole)

    def check(self, ticket: UploadTicket, signature: str) -> None:
        """Raises UploadRefused for a forged or an expired ticket."""
        if not hmac.compare_digest(self.signature(ticket).encode(), signature.encode()):
            raise UploadRefused("this upload address was not made by this hub, or was changed on the way.")
        if time.time() > ticket.expires_s:
            raise UploadRefused("this upload address has expired; start the upload again.")

    def xet_token(self, ticket: XetTicket) -> str:
        """The ticket as one word, signed."""
        text = f"xet:{ticket.repo_id}:{ticket.user}:{ticket.expires_s}"
        return f"{text}:{self._sign(text)}"

    def xet_ticket(self, token: str) -> XetTicket:
        """Read `xet_token` back. Raises InvalidToken for one that is forged or expired."""
        text, _, signature = token.rpartition(":")
        if not hmac.compare_digest(self._sign(text).encode(), signature.encode()):
            raise InvalidToken
        _, repo, user, expires = text.split(":")
        ticket = XetTicket(RepoId.parse(repo), user, int(expires))
        if time.time() > ticket.expires_s:
            raise InvalidToken
        return ticket

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
