"""What a model is: base architecture, layer plan, geometry of its mixers. No torch in here."""

from hylo_megatron.config.architecture import Architecture
from hylo_megatron.config.geometry import Geometry, geometry_preset
from hylo_megatron.config.plan import Plan
from hylo_megatron.mixers.gdn.geometry import GDNGeometry
from hylo_megatron.mixers.mamba2.geometry import Mamba2Geometry
from hylo_megatron.mixers.mla.geometry import MLAGeometry

__all__ = ["Architecture", "GDNGeometry", "Geometry", "MLAGeometry", "Mamba2Geometry", "Plan", "geometry_preset"]
