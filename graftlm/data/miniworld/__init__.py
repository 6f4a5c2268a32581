"""The mini world: four modalities rendered from hidden scenes, small enough for a CPU, and read from real files.

`world.build` writes PNG, MP4, WAV and PLY files and annotations in the public formats of COCO, OK-VQA, MSVD,
MSVD-QA, AudioCaps, Clotho-AQA, Cap3D, Cap3D-QA and MCUB. `scenes` draws what is hidden, `render` shows it,
`language` talks about it, `text` is the text-only corpus of the base LLM.

Every scene belongs to one split for good, by a hash of what it shows (`scenes.split_of`); whoever draws scenes, for
data sets, encoders or text, draws them within a split, so no test scene is ever seen in training.
"""

__all__: list[str] = []
