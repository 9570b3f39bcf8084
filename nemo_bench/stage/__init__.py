"""The stage folder: what a job on a cluster needs besides its dataset.

<stage>/<entrypoint.image>            the container image as a squash file
<stage>/llama3.1-dataset/llama/       the tokenizer, in Hugging Face's files
<stage>/nemo_bench/                   this project's code, and in wheels/ the packages it needs
<stage>/stage.json                    where these are from, with the size and SHA-256 of every file
"""
