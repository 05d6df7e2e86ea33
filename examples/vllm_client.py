"""A question about a video file to a running server of vLLM with ST-GridPool, over the HTTP interface of OpenAI.

vllm serve Qwen/Qwen3-VL-8B-Instruct --hf-overrides \\
    '{"architectures": ["StgpQwen3VLForConditionalGeneration"], "stgp_options": {"frame_strides": [1, 2, 4]}}'

python examples/vllm_client.py clip.mp4
python examples/vllm_client.py clip.mp4 --question "Who is it?" --server http://127.0.0.1:8000

The client needs nothing but Python, and its request is the same without ST-GridPool, which the server alone knows of.
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(address: str, request: dict[str, Any] | None = None) -> Any:
    """Return what the server answers to a request, or to none."""
    body = None if request is None else json.dumps(request).encode()
    posted = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(posted) as response:
        return json.load(response)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path, help="a video file, whose bytes are sent")
    parser.add_argument("--question", default="What happens in the video?")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address (default: http://127.0.0.1:8000)")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: 64)")
    args = parser.parse_args()
    kind = mimetypes.guess_type(args.video)[0] or ""
    if not kind.startswith("video/") or not args.video.is_file():
        parser.error(f"{args.video} must be a video file with the suffix of one, such as .mp4")

    url = f"data:{kind};base64,{base64.b64encode(args.video.read_bytes()).decode()}"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": args.question}]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": args.max_tokens, "temperature": 0}
    server = args.server.rstrip("/")
    try:
        model = ask(f"{server}/v1/models")["data"][0]["id"]
        answer = ask(f"{server}/v1/chat/completions", {"model": model, **request})
    except urllib.error.HTTPError as error:
        parser.error(f"{server} answers {error.code}: {error.read().decode()}")
    except (OSError, ValueError, LookupError) as error:
        parser.error(f"{server} does not answer as a server of vLLM: {error}")
    print(f"{model}: {answer['usage']['prompt_tokens']} tokens in the prompt")
    print(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
