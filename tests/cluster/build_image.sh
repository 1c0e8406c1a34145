#!/usr/bin/env bash
# Build the image of ./Dockerfile: with a Docker engine where there is one, else with buildah as root on a base made by debootstrap.
# Prints the image's name as its last line.
#
#   IMAGE            name of the image                                   (ddpm_ema:latest)
#   BASE_IMAGE       a base to use instead of the Dockerfile's or ours
#   BUILD_ARGS       more arguments of the build, e.g. "--build-arg OFFLINE=1"
#   IMAGE_STATE      where buildah keeps layers, some 15 GB              (/var/tmp/ddpm_ema-image)
#   DEBIAN_MIRROR    where debootstrap fetches the base                  (debootstrap's own default)
#
# A host that reaches its package index through settings of its own (pip's configuration, certificates, local wheels) lends them
# to the build as read-only mounts: nothing of them is written into a layer.
set -euo pipefail
cd "$(dirname "$0")/../.."

IMAGE=${IMAGE:-ddpm_ema:latest}
read -r -a build_args <<<"${BUILD_ARGS:-}"

if [[ -z ${USE_BUILDAH:-} ]] && command -v docker >/dev/null && docker info >/dev/null 2>&1; then
    [[ -n ${BASE_IMAGE:-} ]] && build_args+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    DOCKER_BUILDKIT=1 docker build "${build_args[@]}" --tag "$IMAGE" .
    echo "$IMAGE"
    exit 0
fi

# shellcheck source=tests/cluster/buildah.sh
source tests/cluster/buildah.sh
require_buildah

if [[ -z ${BASE_IMAGE:-} ]]; then
    BASE_IMAGE=localhost/ddpm_ema-base:bookworm
    if ! bah inspect --type image "$BASE_IMAGE" >/dev/null 2>&1; then
        command -v debootstrap >/dev/null || { echo "build_image: no debootstrap; install it or set BASE_IMAGE" >&2; exit 1; }
        rootfs=$(mktemp -d "$IMAGE_STATE/rootfs.XXXXXX")
        trap 'rm -rf --one-file-system "$rootfs"' EXIT
        # The same Debian release as the Dockerfile's default base; updates come from its own sources.list.
        debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$rootfs" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
        container=$(bah from scratch)
        bah add --quiet "$container" "$rootfs" / >/dev/null
        bah config --cmd /bin/bash "$container"
        bah commit --quiet --rm "$container" "$BASE_IMAGE" >/dev/null
    fi
fi

mapfile -t mounts < <(host_pip_mounts)
bah build --layers --format oci --isolation chroot --network host "${mounts[@]}" "${build_args[@]}" \
    --build-arg "BASE_IMAGE=$BASE_IMAGE" --tag "$IMAGE" --file Dockerfile .
echo "$IMAGE"
