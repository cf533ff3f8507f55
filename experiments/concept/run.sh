#!/usr/bin/env bash
# All of the experiment, in runs/concept.
set -eu
here=$(dirname "$0") folder=runs/concept
run() { sophon "$1" --config-dir="$here/conf" experiment=concept device=cpu threads=1 run_dir="$folder/$2" "${@:3}"; }
audit() { run audit "audit_$1" reference=$folder/reference checkpoint="$folder/$2" "${@:3}"; }
python "$here/pipeline.py" $folder/pipeline
run pretrain reference domain.pretrained_on=both
run pretrain filtered
run protect unlearned reference=$folder/reference
run protect removed reference=$folder/reference method=concept_removed
run protect protected reference=$folder/removed method=concept_protected
audit scratch unlearned "attack.roles=[scratch]"
for model in unlearned removed protected; do
    roles="attack.roles=[protected]" filtered=
    [ $model = unlearned ] && roles="attack.roles=[protected,unprotected]" filtered="filtered=[$folder/filtered]"
    audit $model $model "$roles" $filtered
    audit ${model}_light $model attack=concept_light attack.reuse="[$folder/audit_$model]" "$roles" $filtered
done
