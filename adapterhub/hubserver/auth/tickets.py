"""Signed permissions: upload URLs, and short-lived tokens for Xet."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass

from adapterhub.hubserver.errors import InvalidToken, InvalidUploadTicket
from adapterhub.hubserver.names import RepoId

UPLOAD_LIFETIME_S = 6 * 3600
XET_LIFETIME_S = 3600


@dataclass(frozen=True)
class UploadTicket:
    """The permission to upload one object to one repository; its fields are part of the upload URL."""

    repo_id: RepoId
    sha256: str
    size_bytes: int
    expires_s: int
    """Expiry time, in seconds since 1970."""
    spool: str = ""
    """Name of the file that collects the parts; empty for an upload in one request."""
    part: int = 0
    """Part number, from 1; 0 stands for the whole object."""


@dataclass(frozen=True)
class XetTicket:
    """The permission of one user to upload chunks and files to one repository."""

    repo_id: RepoId
    user: str
    expires_s: int
    """Expiry time, in seconds since 1970."""


class Signer:
    """Signs tickets with HMAC-SHA256 and verifies them; a signed ticket replaces a token."""

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def ticket(self, repo_id: RepoId, sha256: str, *, size_bytes: int) -> UploadTicket:
        """Return a ticket that is valid for UPLOAD_LIFETIME_S from now."""
        return UploadTicket(repo_id, sha256, size_bytes, int(time.time()) + UPLOAD_LIFETIME_S)

    def signature(self, ticket: UploadTicket) -> str:
        """Return the signature of all fields of the ticket, in hex."""
        whole = f"upload {ticket.repo_id} {ticket.sha256} {ticket.size_bytes} {ticket.expires_s}"
        return self._sign(f"{whole} {ticket.spool} {ticket.part}" if ticket.spool else whole)

    def check(self, ticket: UploadTicket, signature: str) -> None:
        """Check the signature and the expiry time. Raises InvalidUploadTicket."""
        if not hmac.compare_digest(self.signature(ticket).encode(), signature.encode()):
            raise InvalidUploadTicket("invalid upload URL: its signature is not from this hub. Start the upload again.")
        if time.time() > ticket.expires_s:
            raise InvalidUploadTicket("the upload URL has expired: start the upload again.")

    def xet_token(self, ticket: XetTicket) -> str:
        """Return the ticket and its signature as one token."""
        text = f"xet:{ticket.repo_id}:{ticket.user}:{ticket.expires_s}"
        return f"{text}:{self._sign(text)}"

    def xet_ticket(self, token: str) -> XetTicket:
        """Parse and check a token from `xet_token`. Raises InvalidToken if it is forged or expired."""
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
