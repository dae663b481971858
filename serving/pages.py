"""The pages: each is one file without a foreign address, under a policy that lets in no other."""

import base64
import functools
import hashlib
import re
from pathlib import Path

from flask import Response, abort, send_from_directory

FOLDER = Path(__file__).resolve().parent
SWAGGER_FILES = ("swagger-ui.css", "swagger-ui-bundle.js")
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src {script};"
    " style-src {style}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def page(name: str) -> tuple[str, str]:
    """The text of a page, and its Content-Security-Policy."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return text, POLICY.format(
        script=sources("script", "<script src=", text),
        style=sources("style", '<link rel="stylesheet"', text),
    )


def sources(tag: str, reference: str, text: str) -> str:
    """CSP Level 3, 2.3.1: the SHA-256 of each inline script or style, and own files."""
    inline = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()) for content in inline]
    own = ["'self'"] if reference in text else []
    return " ".join([*own, *(f"'sha256-{digest.decode()}'" for digest in digests)])


def answer(name: str) -> Response:
    text, policy = page(name)
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Response(text, headers=headers, content_type="text/html; charset=utf-8")


def swagger_file(name: str) -> Response:
    """A file of flask-swagger-ui that the page of /docs asks for."""
    import flask_swagger_ui  # type: ignore[import-untyped]

    if name not in SWAGGER_FILES:
        abort(404)
    folder = Path(flask_swagger_ui.__file__).with_name("dist")
    return send_from_directory(folder, name, conditional=False)
