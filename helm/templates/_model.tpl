{{/* Where the checkpoint comes from: generate, hostPath, pvc or objectStore. */}}
{{- define "baton.modelSource" -}}
{{- $given := list -}}
{{- with .Values.model -}}
{{- if .generate -}}{{- $given = append $given "generate" -}}{{- end -}}
{{- if .hostPath -}}{{- $given = append $given "hostPath" -}}{{- end -}}
{{- if .pvc.claimName -}}{{- $given = append $given "pvc" -}}{{- end -}}
{{- if .objectStore.url -}}{{- $given = append $given "objectStore" -}}{{- end -}}
{{- end -}}
{{- if ne (len $given) 1 -}}
{{- fail (printf "model: expected exactly one of generate, hostPath, pvc.claimName and objectStore.url, got %s" (join ", " $given | default "none")) -}}
{{- end -}}
{{- first $given -}}
{{- end -}}

{{- define "baton.modelVolume" -}}
{{- $source := include "baton.modelSource" . -}}
{{- $cache := .Values.model.objectStore.cache -}}
- name: model
{{- if eq $source "pvc" }}
  persistentVolumeClaim: {claimName: {{ .Values.model.pvc.claimName }}, readOnly: true}
{{- else if eq $source "hostPath" }}
  hostPath: {path: {{ .Values.model.hostPath }}, type: Directory}
{{- else if and (eq $source "objectStore") $cache.hostPath }}
  hostPath: {path: {{ $cache.hostPath }}, type: DirectoryOrCreate}
{{- else if and (eq $source "objectStore") $cache.claimName }}
  persistentVolumeClaim: {claimName: {{ $cache.claimName }}}
{{- else }}
  emptyDir: {{ with $cache.sizeLimit }}{sizeLimit: {{ . }}}{{ else }}{}{{ end }}
{{- end }}
{{- end -}}

{{- define "baton.modelMount" -}}
{{- $subPath := .Values.model.pvc.subPath -}}
- name: model
  mountPath: {{ ternary "/models" "/models/checkpoint" (has (include "baton.modelSource" .) (list "generate" "objectStore")) }}
{{- if and .Values.model.pvc.claimName $subPath }}
  subPath: {{ $subPath }}
{{- end }}
{{- end -}}

{{/* Init container: brings the checkpoint where that is needed, and refuses one that is not complete. */}}
{{- define "baton.modelInit" -}}
{{- $source := include "baton.modelSource" .root -}}
{{- $model := .root.Values.model -}}
- name: model
  {{- include "baton.container" .root | nindent 2 }}
  {{- if eq $source "generate" }}
  command: [/bin/sh, -ec]
  args:
    - |
      [ -e /models/checkpoint/config.json ] || baton model make {{ $model.generate }} --out /models/checkpoint
      exec python -m deploy.kube model --path /models/checkpoint
  {{- else }}
  {{- $args := list "python" "-m" "deploy.kube" "model" "--path" "/models/checkpoint" -}}
  {{- if eq $source "objectStore" -}}
  {{- $args = concat $args (list "--source" $model.objectStore.url "--timeout" (int $model.objectStore.timeoutSeconds | toString)) -}}
  {{- end -}}
  {{- if not .weights -}}{{- $args = append $args "--no-weights" -}}{{- end }}
  command: {{ $args | toJson }}
  {{- if and (eq $source "objectStore") $model.objectStore.secretName }}
  envFrom:
    - secretRef: {name: {{ $model.objectStore.secretName }}}
  {{- end }}
  {{- end }}
  {{- if and (eq $source "objectStore") (not .weights) }}
  resources:
    requests: {cpu: 250m, memory: 512Mi}
    limits: {memory: 1Gi}
  {{- else }}
  resources: {{- toYaml $model.resources | nindent 4 }}
  {{- end }}
  env:
    - {name: HOME, value: /var/lib/baton}
    - {name: NUMBA_CACHE_DIR, value: /tmp/numba}
  volumeMounts:
    {{- include "baton.volumeMounts" .root | nindent 4 }}
    {{- include "baton.modelMount" .root | nindent 4 }}
{{- end -}}
