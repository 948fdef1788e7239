{{/* Name of everything: a DNS-1035 label, short enough for the names that KubeRay makes of it. */}}
{{- define "baton.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$" $name) -}}
{{- fail (printf "release name %q: expected at most 40 of a-z, 0-9 and -, beginning with a letter; or set fullnameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "baton.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "baton.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default (printf "%s-%s" $.Chart.AppVersion $.Values.accelerator.type) .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.secretName" -}}
{{- default (printf "%s-key" (include "baton.fullname" .)) .Values.security.existingSecret -}}
{{- end -}}

{{/* The pools that may ever have a worker, as a JSON list. */}}
{{- define "baton.pools" -}}
{{- $pools := list -}}
{{- range $pool := list "prefill" "decode" "aggregated" -}}
{{- if gt (int (index $.Values $pool).maxReplicas) 0 -}}{{- $pools = append $pools $pool -}}{{- end -}}
{{- end -}}
{{- $pools | toJson -}}
{{- end -}}

{{/* Address of the controller's control channel. */}}
{{- define "baton.control" -}}
tcp://{{ include "baton.fullname" . }}-controller:{{ .Values.controller.ports.control | int }}
{{- end -}}

{{/* An image with its pull policy. */}}
{{- define "baton.container" -}}
image: {{ include "baton.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {{- toYaml .Values.worker.securityContext | nindent 2 }}
{{- end -}}

{{/* Environment of every process of Baton and Ray. */}}
{{- define "baton.env" -}}
- name: BATON_SECRET
  valueFrom: {secretKeyRef: {name: {{ include "baton.secretName" . }}, key: secret}}
- name: BATON_SECRET_ALSO
  valueFrom: {secretKeyRef: {name: {{ include "baton.secretName" . }}, key: also, optional: true}}
{{- with .Values.security.revision }}
- {name: BATON_SECRET_REVISION, value: {{ . | quote }}}
{{- end }}
- {name: HOME, value: /var/lib/baton}
- {name: NUMBA_CACHE_DIR, value: /tmp/numba}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- end -}}

{{/* A silent node counts as lost after about 20 s; Ray's own default is more than a minute. */}}
{{- define "baton.rayHealth" -}}
- {name: RAY_health_check_period_ms, value: "3000"}
- {name: RAY_health_check_timeout_ms, value: "5000"}
- {name: RAY_health_check_failure_threshold, value: "3"}
{{- end -}}

{{- define "baton.volumes" -}}
- {name: config, configMap: {name: {{ include "baton.fullname" . }}-config}}
- {name: tmp, emptyDir: {}}
- {name: home, emptyDir: {}}
{{- end -}}

{{- define "baton.volumeMounts" -}}
- {name: config, mountPath: /etc/baton, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/baton}
{{- end -}}

{{/* Where a pod runs; `.placement` is a values section. */}}
{{- define "baton.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* What the schema can't say. Included once, by the configuration. */}}
{{- define "baton.check" -}}
{{- $ascend := eq .Values.accelerator.type "ascend" -}}
{{- if and (ne .Values.accelerator.type "cpu") (not .Values.accelerator.resource) -}}
{{- fail (printf "accelerator.resource: name the device plugin's resource, such as %s" (ternary "huawei.com/Ascend910" "nvidia.com/gpu" $ascend)) -}}
{{- end -}}
{{- $claimed := 0 -}}
{{- range $pool := include "baton.pools" . | fromJsonArray -}}
{{- $p := index $.Values $pool -}}
{{- if or (gt (int $p.minReplicas) (int $p.replicas)) (gt (int $p.replicas) (int $p.maxReplicas)) -}}
{{- fail (printf "%s: expected minReplicas <= replicas <= maxReplicas, got %d <= %d <= %d" $pool (int $p.minReplicas) (int $p.replicas) (int $p.maxReplicas)) -}}
{{- end -}}
{{- if ne (eq $.Values.accelerator.type "cpu") (eq (int $p.cards) 0) -}}
{{- fail (printf "%s.cards=%d: expected %s with accelerator.type=%s" $pool (int $p.cards) (ternary "0" "1, 2, 4, 8 or 16" (eq $.Values.accelerator.type "cpu")) $.Values.accelerator.type) -}}
{{- end -}}
{{- if $ascend -}}
{{- $floor := add 20000 (mul 1000 (int $p.cards)) -}}
{{- range $name, $port := $.Values.worker.ports -}}
{{- if lt (int $port) (int $floor) -}}
{{- fail (printf "worker.ports.%s=%d: with %d cards Ascend's direct transport takes ports up to %d; choose a higher one" $name (int $port) (int $p.cards) (int $floor)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $claimed = add $claimed (mul (int $p.replicas) (max 1 (int $p.cards))) -}}
{{- end -}}
{{- with .Values.autoscaling.maxCards -}}
{{- if gt (int $claimed) (int .) -}}
{{- fail (printf "autoscaling.maxCards=%d: the pools' replicas need %d" (int .) (int $claimed)) -}}
{{- end -}}
{{- end -}}
{{- if not (or (and (index .Values "prefill").maxReplicas (index .Values "decode").maxReplicas) .Values.aggregated.maxReplicas) -}}
{{- fail "prefill and decode both need maxReplicas above 0, or aggregated does" -}}
{{- end -}}
{{- $ports := list -}}
{{- range concat (values .Values.worker.ports) (values .Values.controller.ports) -}}{{- $ports = append $ports (int .) -}}{{- end -}}
{{- if ne (len (uniq $ports)) (len $ports) -}}
{{- fail "worker.ports and controller.ports: a port is used twice" -}}
{{- end -}}
{{- end -}}
