"""A question about a video to a Qwen-VL model of transformers, which gets a quarter of the video's tokens.

python examples/transformers_qwen.py Qwen/Qwen3-VL-8B-Instruct clip.mp4
python examples/transformers_qwen.py checkpoint/ clip.mp4 --frame-strides 1 2 4 --output-size 8 8 --temperature 2
python examples/transformers_qwen.py checkpoint/ clip.mp4 --mode grid    # summaries alone: as many tokens as before

It needs transformers and torchvision, and PyAV to decode the video (pip install ".[demo]").
"""

from __future__ import annotations

import argparse

import av
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from stgridpool_kernels.integrations import qwen_vl
from stgridpool_kernels.io.video import count_frames, read_frames, sample_indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name or folder of a checkpoint")
    parser.add_argument("video", help="a video file")
    parser.add_argument("--question", default="What happens in the video?")
    parser.add_argument("--frames", type=int, default=32, help="most frames of the video (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")
    parser.add_argument(
        "--mode", choices=("pool", "grid"), default="pool", help="pool, or summaries alone (default: pool)"
    )
    options = parser.add_argument_group("options of grid_pool, with their defaults")
    options.add_argument("--frame-strides", type=int, nargs="+", metavar="N", help="in pairs of frames (2 4 8)")
    options.add_argument("--output-size", type=int, nargs=2, metavar=("ROWS", "COLS"), help="tokens left of a frame")
    options.add_argument("--temperature", type=float, help="of the weights in a window (1)")
    args = parser.parse_args()
    names = ("frame_strides", "output_size", "temperature")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    try:
        total, frames = count_frames(args.video), read_frames(args.video, args.frames)
        processor = AutoProcessor.from_pretrained(args.model)
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
        qwen_vl.patch(model, processor, mode=args.mode, **given)  # from here on, until qwen_vl.unpatch
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    with av.open(args.video) as container:  # Qwen's prompts say when a frame was
        rate = float(container.streams.video[0].average_rate or 24)
    times = VideoMetadata(total_num_frames=total, fps=rate, frames_indices=sample_indices(total, len(frames)))
    content = [{"type": "video"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    read = {"videos": [frames], "video_metadata": [times], "do_sample_frames": False}
    inputs = processor(text=[prompt], **read, return_tensors="pt").to(model.device, model.dtype)

    grid = inputs["video_grid_thw"][0]  # pairs of frames, rows and columns of patches
    tokens = int(grid.prod()) // model.config.vision_config.spatial_merge_size**2
    places = int((inputs["input_ids"] == processor.video_token_id).sum())
    print(f"{len(frames)} frames, {grid[0]} after the encoder: {tokens} tokens → {places} in the prompt")

    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
