"""Tables of labels in use: {name of the table: {label: name}}.

"totalsegmentator" has the 117 classes of TotalSegmentator's task "total" (version 2), "totalsegmentator_mr" the 50 of
"total_mr" (https://github.com/wasserth/TotalSegmentator, doi:10.1148/ryai.230024).
"""

_VERTEBRAE = [
    *["S1"],
    *[f"L{number}" for number in range(5, 0, -1)],
    *[f"T{number}" for number in range(12, 0, -1)],
    *[f"C{number}" for number in range(7, 0, -1)],
]
_ABDOMEN = "spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left"
_MUSCLES = """
    gluteus_maximus_left gluteus_maximus_right gluteus_medius_left gluteus_medius_right gluteus_minimus_left
    gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left iliopsoas_right brain
"""
_VESSELS = "portal_vein_and_splenic_vein iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right"
_BONES = """
    humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right
    hip_left hip_right
"""
_TOTAL = f"""
    {_ABDOMEN}
    lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right
    esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate kidney_cyst_left
    kidney_cyst_right sacrum {" ".join(f"vertebrae_{name}" for name in _VERTEBRAE)} heart aorta pulmonary_vein
    brachiocephalic_trunk subclavian_artery_right subclavian_artery_left common_carotid_artery_right
    common_carotid_artery_left brachiocephalic_vein_left brachiocephalic_vein_right atrial_appendage_left
    superior_vena_cava inferior_vena_cava {_VESSELS}
    {_BONES} spinal_cord {_MUSCLES} skull
    {" ".join(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13))}
    sternum costal_cartilages
"""
_TOTAL_MR = f"""
    {_ABDOMEN} lung_left lung_right esophagus small_bowel duodenum colon urinary_bladder prostate sacrum vertebrae
    intervertebral_discs spinal_cord heart aorta inferior_vena_cava {_VESSELS}
    {_BONES} {_MUSCLES}
"""
TABLES: dict[str, dict[int, str]] = {
    "totalsegmentator": dict(enumerate(_TOTAL.split(), 1)),
    "totalsegmentator_mr": dict(enumerate(_TOTAL_MR.split(), 1)),
}
