"""PyTorch's CUDA caching allocator as a model of its own: what is allocated and reserved, block by block."""

from planner.allocator.caching import CachingAllocator, OutOfDeviceMemory, Segment, SegmentBlock
from planner.allocator.config import AllocatorConfig

__all__ = ["AllocatorConfig", "CachingAllocator", "OutOfDeviceMemory", "Segment", "SegmentBlock"]
