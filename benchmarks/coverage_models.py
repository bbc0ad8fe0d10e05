"""The models of the coverage benchmark: a small member of every family of timm that classifies images."""

from __future__ import annotations

SIZES = {"vit_small_patch14_dinov2": 224, "vit_small_patch16_dinov3": 224}
"""Images' sides in pixels, where the model's own is needlessly large."""

MODELS = (
    # convolutional
    "resnet18", "resnet50", "resnext50_32x4d", "seresnet18", "skresnet18", "resnest14d", "res2net50_26w_4s",
    "resnetrs50", "resnetv2_50", "resnetv2_50x1_bit", "nfnet_l0", "regnetx_002", "regnety_002", "regnetz_b16",
    "vgg11_bn", "densenet121", "dla34", "dpn68", "hrnet_w18_small", "inception_v3", "xception41", "darknet53",
    "cspresnet50", "ese_vovnet19b_dw", "selecsls42b", "hgnetv2_b0", "gernet_s", "tresnet_m", "rdnet_tiny",
    "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small", "mnasnet_100", "lcnet_050", "tinynet_e",
    "hardcorenas_a", "efficientnet_b0", "efficientnetv2_rw_t", "rexnet_100", "ghostnet_100", "repghostnet_050",
    "fasternet_t0", "starnet_s1", "repvgg_a0", "mobileone_s0", "repvit_m0_9", "convnext_atto", "convnextv2_atto",
    "inception_next_tiny", "convmixer_768_32", "mambaout_femto", "focalnet_tiny_srf", "poolformer_s12",
    # transformers, MLPs and mixtures
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3", "beit_base_patch16_224", "eva02_tiny_patch14_224", "flexivit_small",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "cait_xxs24_224", "crossvit_tiny_240", "pit_ti_224",
    "tnt_s_patch16_224", "convit_tiny", "nest_tiny", "twins_pcpvt_small", "pvt_v2_b0", "xcit_nano_12_p16_224",
    "volo_d1_224", "davit_tiny", "hiera_tiny_224", "mvitv2_tiny", "gcvit_xxtiny", "maxvit_nano_rw_256",
    "coatnet_0_rw_224", "coat_lite_tiny", "levit_128", "visformer_tiny", "efficientformer_l1", "efficientformerv2_s0",
    "efficientvit_b0", "efficientvit_m0", "shvit_s1", "swiftformer_xs", "tiny_vit_5m_224", "edgenext_xx_small",
    "fastvit_t8", "mobilevit_xxs", "mobilevitv2_050", "mobilenetv4_hybrid_medium", "nextvit_small", "caformer_s18",
    "mixer_s32_224", "resmlp_12_224", "gmlp_s16_224", "sequencer2d_s",
)  # fmt: skip
