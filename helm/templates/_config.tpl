{{/* A tree as TOML: one line per value, `section.key = value`. JSON scalars and lists are TOML too. */}}
{{- define "baton.toml" -}}
{{- $prefix := .prefix -}}
{{- range $key, $value := .tree }}
{{- $bare := ternary $key ($key | toJson) (regexMatch "^[A-Za-z0-9_-]+$" $key) -}}
{{- $path := ternary $bare (printf "%s.%s" $prefix $bare) (eq $prefix "") -}}
{{- if kindIs "map" $value }}
{{- include "baton.toml" (dict "prefix" $path "tree" $value) }}
{{- else if not (kindIs "invalid" $value) }}
{{ $path }} = {{ $value | toJson }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The configuration as JSON: what the chart knows, and .Values.config on top. */}}
{{- define "baton.config" -}}
{{- include "baton.check" . -}}
{{- $backends := dict "cpu" "cpu" "gpu" "triton" "ascend" "npu" -}}
{{- $rayCards := dict "cpu" "" "gpu" "GPU" "ascend" "NPU" -}}
{{- $pools := dict -}}
{{- range $pool := list "prefill" "decode" "aggregated" -}}
{{- $p := index $.Values $pool -}}
{{- $resources := dict (include "baton.rayResource" (dict "root" $ "pool" $pool)) 1 -}}
{{- if gt (int $p.cards) 0 -}}{{- $_ := set $resources (index $rayCards $.Values.accelerator.type) (int $p.cards) -}}{{- end -}}
{{- $size := dict "replicas" (int $p.replicas) "min_replicas" (int $p.minReplicas) "max_replicas" (int $p.maxReplicas) "cards" (max 1 (int $p.cards)) "resources" $resources -}}
{{- $_ := set $pools $pool $size -}}
{{- end -}}
{{- $ports := .Values.worker.ports -}}
{{- $own := .Values.controller.ports -}}
{{- $worker := dict "request_port" (int $ports.request) "control_port" (int $ports.control) "metrics_port" (int $ports.metrics) "drain_timeout_s" (.Values.worker.drainSeconds | int) -}}
{{- $controller := dict "host" "0.0.0.0" "feed_port" (int $own.feed) "control_port" (int $own.control) "metrics_port" (int $own.metrics) "start_timeout_s" (.Values.controller.startSeconds | int) -}}
{{- $router := dict "host" "0.0.0.0" "port" (int .Values.router.port) "processes" (int .Values.router.processes) "drain_timeout_s" (.Values.router.drainSeconds | int) "membership" (printf "tcp://%s-controller:%d" (include "baton.fullname" .) (int $own.feed)) "controller" (include "baton.control" .) -}}
{{- if .Values.security.tenantsSecret -}}{{- $_ := set $router "tenants_file" "/etc/baton-tenants/tenants.toml" -}}{{- end -}}
{{- $autoscaler := dict "mode" .Values.autoscaling.mode "ttft_slo_s" .Values.autoscaling.ttftSeconds "tpot_slo_s" .Values.autoscaling.tpotSeconds "router_metrics" (list (printf "http://%s-routers:%d/metrics" (include "baton.fullname" .) (int .Values.router.port))) -}}
{{- with .Values.autoscaling.maxCards -}}{{- $_ := set $autoscaler "max_cards" (int .) -}}{{- end -}}
{{- $model := dict "path" "/models/checkpoint" "name" .Values.model.name -}}
{{- with .Values.model.maxLen -}}{{- $_ := set $model "max_len" (int .) -}}{{- end -}}
{{- $tree := dict "model" $model "engine" (dict "backend" (index $backends .Values.accelerator.type)) "worker" $worker "router" $router "controller" $controller "pools" $pools "autoscaler" $autoscaler -}}
{{- mustMergeOverwrite $tree (deepCopy .Values.config) | toJson -}}
{{- end -}}

{{/* Changes when a router must be restarted for it: pool sizes are not the routers' business. */}}
{{- define "baton.routerChecksum" -}}
{{- omit (include "baton.config" . | fromJson) "pools" "autoscaler" "controller" | toJson | sha256sum -}}
{{- end -}}
