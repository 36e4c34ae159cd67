"""Every error that is raised on purpose, with its exit code and HTTP status.

    AdapterHubError
      InvalidRef                a reference that cannot be parsed                   exit 2   400
      AdapterNotFound           no such adapter (where we looked, nearest names)    exit 3   404
      BaseNotFound              no such base model                                  exit 3   404
      PackageError              the folder is not a sound adapter package           exit 4   422
        MissingFile  UnexpectedFile  UnsafeFile  DigestMismatch
        InvalidManifest  InvalidTensors  SignatureInvalid  InvalidBundle
        BundleTooLarge (413)
      Incompatible              sound, but not for this base or this engine         exit 5   422
        IncompatibleBase  AdapterUnsupported  AdapterNoEffect  RankTooLarge  ProbeMismatch
        BaseUnsupported         a base that is not computed as transformers does
      HubError                  an error of the Hub or of the network               exit 1   502
        HubUnavailable          unreachable or failing; trying later can help       exit 75  502
        NotAuthorized           wrong, missing or too weak a token                  exit 1   401
        Conflict                another process changed it first                    exit 1   409
      RecipeError               a recipe with faults, all of them listed            exit 2   400
      DatasetError              training data with faults, file and line of each    exit 2   400
      UsageError                a request that makes no sense as asked              exit 2   400
        OutputNotFresh          an output folder that is not empty
        RunNotResumable         no stopped training run at that folder
        AliasProtected (403)    the trust policy lets only promote and rollback move this alias
        ConstraintFailed        guided decoding that no token can continue
      StorageFull               the disk is full                                    exit 1   507
      TrainingFailed            the run cannot continue (NaN loss, out of memory)   exit 1   500
      TrainingStopped           stopped by a signal; a checkpoint was written       exit 130
      ServeError                the server cannot do this now                       exit 1   503
        ServerBusy (429)  RequestTooLong (400)  AdapterLoadFailed (503)  EngineStopped (503)
        RequestFailed (500)     this one request cannot be computed; others continue
          NonFiniteLogits (422) its adapter or the base computes NaN or Inf
        PortBusy
        TrainingBusy (409)      a training run is active: a server runs one at a time
        TrainingRunNotFound (404)
        InvalidKey (401)  NotAllowed (403)    a client's API key is wrong, or may not do this
        SiteNotAllowed (403)    a web page of another site, or a name that is not this server's
        BodyTimeout (408)  BodyTooLarge (413)  WrongContentType (415)    a request body that is refused
      DemoFailed                a step of the demo failed                           exit 1

Exit codes: 0 done, 1 failed while running, 2 wrong usage, 3 not found, 4 verification failed,
5 incompatible, 75 try again later, 130 interrupted.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` on one line, with control characters, escape sequences and bidi overrides written as escapes.

    For text that others wrote: names, paths and titles must not move the cursor, forge lines or turn text around.
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class AdapterHubError(Exception):
    """Base of all errors raised on purpose. The message is one line: what happened, what to do next."""

    exit_code = 1
    http_status = 500
    code = "internal_error"
    """The `code` of the OpenAI-shaped error body."""

    def __str__(self) -> str:
        """Return the message as one printable line."""
        return printable(super().__str__())


class InvalidRef(AdapterHubError):
    exit_code, http_status, code = 2, 400, "invalid_reference"


class AdapterNotFound(AdapterHubError):
    exit_code, http_status, code = 3, 404, "model_not_found"


class BaseNotFound(AdapterHubError):
    exit_code, http_status, code = 3, 404, "base_not_found"


class PackageError(AdapterHubError):
    exit_code, http_status, code = 4, 422, "adapter_invalid"


class MissingFile(PackageError):
    code = "adapter_file_missing"


class UnexpectedFile(PackageError):
    code = "adapter_file_unexpected"


class UnsafeFile(PackageError):
    code = "adapter_file_unsafe"


class DigestMismatch(PackageError):
    code = "adapter_digest_mismatch"


class InvalidManifest(PackageError):
    code = "adapter_manifest_invalid"


class InvalidTensors(PackageError):
    code = "adapter_tensors_invalid"


class SignatureInvalid(PackageError):
    code = "adapter_signature_invalid"


class InvalidBundle(PackageError):
    code = "adapter_bundle_invalid"


class BundleTooLarge(PackageError):
    http_status, code = 413, "adapter_bundle_too_large"


class Incompatible(AdapterHubError):
    exit_code, http_status, code = 5, 422, "adapter_incompatible"


class IncompatibleBase(Incompatible):
    code = "adapter_base_mismatch"


class BaseUnsupported(Incompatible):
    code = "base_unsupported"


class AdapterUnsupported(Incompatible):
    code = "adapter_unsupported"


class AdapterNoEffect(Incompatible):
    code = "adapter_no_effect"


class RankTooLarge(Incompatible):
    code = "adapter_rank_too_large"


class ProbeMismatch(Incompatible):
    exit_code, code = 4, "adapter_probe_mismatch"


class HubError(AdapterHubError):
    exit_code, http_status, code = 1, 502, "hub_error"


class HubUnavailable(HubError):
    exit_code, code = 75, "hub_unavailable"


class NotAuthorized(HubError):
    http_status, code = 401, "hub_not_authorized"


class Conflict(HubError):
    http_status, code = 409, "conflict"


class RecipeError(AdapterHubError):
    exit_code, http_status, code = 2, 400, "recipe_invalid"


class DatasetError(AdapterHubError):
    exit_code, http_status, code = 2, 400, "dataset_invalid"

    def __str__(self) -> str:
        """Return the message, whose faults are a line each, printable like that of other errors."""
        return "\n".join(map(printable, Exception.__str__(self).split("\n")))


class UsageError(AdapterHubError):
    exit_code, http_status, code = 2, 400, "invalid_request"


class OutputNotFresh(UsageError):
    code = "output_not_fresh"


class RunNotResumable(UsageError):
    code = "run_not_resumable"


class AliasProtected(UsageError):
    http_status, code = 403, "alias_protected"


class ConstraintFailed(UsageError):
    code = "constraint_failed"


class StorageFull(AdapterHubError):
    http_status, code = 507, "storage_full"


class TrainingFailed(AdapterHubError):
    code = "training_failed"


class TrainingStopped(AdapterHubError):
    exit_code, code = 130, "training_stopped"


class ServeError(AdapterHubError):
    http_status, code = 503, "server_error"


class ServerBusy(ServeError):
    http_status, code = 429, "rate_limit_exceeded"


class RequestTooLong(ServeError):
    exit_code, http_status, code = 2, 400, "context_length_exceeded"


class AdapterLoadFailed(ServeError):
    code = "adapter_load_failed"


class EngineStopped(ServeError):
    code = "engine_stopped"


class RequestFailed(ServeError):
    http_status, code = 500, "request_failed"


class NonFiniteLogits(RequestFailed):
    http_status, code = 422, "non_finite_logits"


class PortBusy(ServeError):
    code = "port_busy"


class TrainingBusy(ServeError):
    http_status, code = 409, "training_busy"


class TrainingRunNotFound(ServeError):
    exit_code, http_status, code = 3, 404, "training_run_not_found"


class InvalidKey(ServeError):
    http_status, code = 401, "invalid_api_key"


class NotAllowed(ServeError):
    http_status, code = 403, "insufficient_permissions"


class SiteNotAllowed(ServeError):
    http_status, code = 403, "site_not_allowed"


class BodyTimeout(ServeError):
    http_status, code = 408, "request_timeout"


class BodyTooLarge(ServeError):
    http_status, code = 413, "request_too_large"


class WrongContentType(ServeError):
    http_status, code = 415, "unsupported_content_type"


class DemoFailed(AdapterHubError):
    code = "demo_failed"
