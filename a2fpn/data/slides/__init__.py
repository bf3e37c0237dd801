"""Images of any size, read window by window."""

from a2fpn.data.slides.base import Slide, SlideOptions, Window
from a2fpn.data.slides.opening import open_slide

__all__ = ["Slide", "SlideOptions", "Window", "open_slide"]
