"""Read and write safetensors files with nothing but numpy and torch.

Debian ships no safetensors package, and the format is small: an 8-byte little-endian header
length, a JSON header, then the raw tensors.
"""

import json
import os
import struct

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load(path):
    """All tensors of a file, as a dict name -> torch.Tensor (owned copies)."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    start = 8 + header_bytes
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        raw = data[start + begin : start + end]
        if end == begin:
            out[name] = torch.empty(entry["shape"], dtype=dtype)
        else:
            out[name] = torch.frombuffer(raw, dtype=dtype).clone().reshape(entry["shape"])
    return out


def load_folder(folder):
    """The tensors of a model folder: one file, or the shards of an index."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        return load(os.path.join(folder, "model.safetensors"))
    with open(index, encoding="utf-8") as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    out = {}
    for shard in shards:
        out.update(load(os.path.join(folder, shard)))
    return out


def save_folder(tensors, folder, limit=15 << 20):
    """One file, or shards of at most `limit` bytes of tensors with their index."""
    shards, used = [{}], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    if len(shards) == 1:
        return save(tensors, os.path.join(folder, "model.safetensors"))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save(shard, os.path.join(folder, name))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=1)
    return None


def save(tensors, path, metadata=None):
    """Write `tensors` (dict name -> tensor) in the order given."""
    header = {"__metadata__": dict(metadata or {"format": "pt"})}
    blobs = []
    offset = 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # numpy has no bfloat16, so every tensor goes out through its bytes.
        size = tensor.element_size()
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        blob = tensor.reshape(-1).view(view).numpy().tobytes()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path + ".part"
    with open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for blob in blobs:
            file.write(blob)
    os.replace(temporary, path)
