"""Reading of images of any size by windows."""

from a2fpn.data.slides.base import Slide, SlideOptions, Thumbnail, Window
from a2fpn.data.slides.opening import WholeSlide, open_slide

__all__ = ["Slide", "SlideOptions", "Thumbnail", "WholeSlide", "Window", "open_slide"]
