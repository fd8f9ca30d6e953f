"""What a model is: its base architecture, its layer plan and the geometry of its mixers. No torch in here."""

from hylo_megatron.config.architecture import Architecture
from hylo_megatron.config.geometry import Geometry, geometry_preset
from hylo_megatron.config.plan import parse_plan, plan_name
from hylo_megatron.mixers.gdn.geometry import GDNGeometry
from hylo_megatron.mixers.mamba2.geometry import Mamba2Geometry
from hylo_megatron.mixers.mla.geometry import MLAGeometry

__all__ = [
    "Architecture",
    "GDNGeometry",
    "Geometry",
    "MLAGeometry",
    "Mamba2Geometry",
    "geometry_preset",
    "parse_plan",
    "plan_name",
]
