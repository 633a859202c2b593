"""Whether the Hub can be reached at all: its client repeats a request for half a minute before it gives up."""

from pathlib import Path

from .errors import CheckpointError

TIMEOUT = 10  # seconds for the Hub's first answer


def check_reachable(model_id: str, filename: str, given: str | None = None, **options) -> None:
    """Raise CheckpointError at once if a file is not here and the Hub does not answer.

    model_id: such as org/name; it may be the path of a folder that is not there as well.
    given: what the user gave, if it is not the id.
    options: of huggingface_hub's `hf_hub_download`.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(model_id, filename, **{**options, "local_files_only": True, "force_download": False})
        return
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise CheckpointError(
            f"{given or model_id}: there is no such file or folder, and it is not an id on the Hub"
        ) from error
    where = f"{given or model_id}: there is no such file or folder in {Path.cwd()}"
    where += ", nothing of that id was downloaded before"
    if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{where}, and the Hub is not to be asked (HF_HUB_OFFLINE or local_files_only)")
    try:
        get_hf_file_metadata(
            hf_hub_url(model_id, filename, revision=options.get("revision")),
            token=options.get("token"),
            timeout=TIMEOUT,
        )
    except HfHubHTTPError:  # it has answered; whoever asks for the file says what is wrong
        return
    except Exception as error:  # of the client's network library, which differs by version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{where}, and the Hub cannot be reached ({reason})") from error
