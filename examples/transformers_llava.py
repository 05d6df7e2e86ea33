"""A question about a video to LLaVA-OneVision or LLaVA-NeXT-Video, with ST-GridPool in place of their own pooling.

python examples/transformers_llava.py llava-hf/llava-onevision-qwen2-0.5b-ov-hf clip.mp4
python examples/transformers_llava.py checkpoint/ clip.mp4 --frames 16 --temperature 2 --question "Who is it?"

It needs transformers and torchvision, and PyAV to decode the video (pip install ".[demo]").
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from stgridpool_kernels.integrations import transformers as stgp_transformers
from stgridpool_kernels.io.video import read_frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name or folder of a checkpoint")
    parser.add_argument("video", help="a video file")
    parser.add_argument("--question", default="What happens in the video?")
    parser.add_argument("--frames", type=int, default=32, help="most frames of the video (default: 32)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the weights in a window (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")
    args = parser.parse_args()

    try:
        frames = read_frames(args.video, args.frames)  # (T, height, width, 3), evenly spread over the video
        processor = AutoProcessor.from_pretrained(args.model)
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
        stgp_transformers.patch(model, temperature=args.temperature)  # from here on, until stgp_transformers.unpatch
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    content = [{"type": "video"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos=[frames], do_sample_frames=False, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)

    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    places = int((inputs["input_ids"] == processor.video_token_id).sum())
    print(f"{len(frames)} frames of {side} × {side} = {len(frames) * side**2} tokens → {places} in the prompt")

    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
